"""The targets: each lowers, packs and runs programs."""
