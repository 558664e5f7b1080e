"""The report: a dump or an artifact as one HTML file, and tables of the same templates for notebooks."""
