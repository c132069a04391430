"""What people look at: tables, figures and reports of a study."""
