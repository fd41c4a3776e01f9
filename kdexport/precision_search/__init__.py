"""Which layers a low precision cannot take: measured, explained, equalised or kept in float32, as few as can be."""
