"""The configuration: schema, presets, help, shell completion."""
