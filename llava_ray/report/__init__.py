"""Reports: one HTML template, tables, plots and image grids. No ray, no torch."""
