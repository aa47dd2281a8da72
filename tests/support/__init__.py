"""What the tests share: a running appliance, an NBD client of their own, the model of a volume's past."""
