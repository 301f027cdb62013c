"""Model frontends: whatever the user has becomes a configuration and a stream of named weights.

``open_model`` recognizes a Hugging Face directory, a GGUF file, a hub id or a file inside an
installed package; :class:`~amx_tvm.frontends.relax_module.RelaxModuleSource` wraps a Relax module.
Everything that can be wrong with the files is found when they are opened, before any work.
"""

from amx_tvm.frontends.source import ModelSource, open_model

__all__ = ["ModelSource", "open_model"]
