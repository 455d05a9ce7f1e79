"In the place of a package that builds a grammar for seconds wherever `jsonschema` is imported: each process of a Ray node, papermill, JupyterLab. `jsonschema` then leaves the format out; nothing here has one."
raise ImportError(__doc__)
