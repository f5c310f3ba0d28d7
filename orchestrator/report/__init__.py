"""What people are told of a run: sentences, tables, pictures, pages."""
