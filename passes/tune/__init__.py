"""Parameters of transforms and codes, trained through the program itself."""
