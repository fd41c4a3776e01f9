"""Networks of other libraries and of the user as teachers and students: their taps are modules that hooks read."""
