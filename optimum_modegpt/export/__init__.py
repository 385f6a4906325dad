"""Export models to the formats of other tools. Each format is imported when it is first used."""
