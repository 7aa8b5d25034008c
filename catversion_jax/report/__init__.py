"""What was found, for people: self-contained HTML pages."""
