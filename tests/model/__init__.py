"""Whatever is done to the appliance, every point equals a plain history of byte arrays."""
