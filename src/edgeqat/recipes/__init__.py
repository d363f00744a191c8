"""The bundled recipes, as YAML files."""
