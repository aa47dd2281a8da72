"""Real clients, not ours, against both servers of a real running appliance."""
