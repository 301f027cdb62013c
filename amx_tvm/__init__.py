"""AMXFP4 large language models, compiled with TVM for the machine at hand."""
