"""The report page: one HTML file that loads nothing from elsewhere."""
