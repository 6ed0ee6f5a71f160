"""From ATen to the dialect, by what a region computes."""
