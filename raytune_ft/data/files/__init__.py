"""Data files and places: any row of any kind of file by its number."""
