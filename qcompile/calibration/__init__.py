"""Text that statistics and figures come from."""
