"""What every room needs and none owns: arguments, files, the terminal."""
