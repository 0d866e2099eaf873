"""A whole model as a folder: what it is, its weights, its adapters, its tokenizer and a card.

    config.json           what the model is (`description`): config, task, labels, what is quantised, what acts
    fingerprint.json      what it computes: facts, and a hash of every tensor (`effzoo.peft.fingerprint`)
    model.safetensors     the base's state dict; above 5 GB several files and model.safetensors.index.json
    buffers.safetensors   buffers that no state dict holds, where they are not those of a new model
    adapters/<name>/      each attached adapter, as `effzoo.save_adapter` writes it
    README.md             a model card
    modeling_effzoo.py    imports effzoo.transformers, for `AutoModel.from_pretrained(..., trust_remote_code=True)`
    tokenizer files       where a tokenizer was given

config.json names the hash of fingerprint.json, and that holds those of the tensors, so files that do not belong
together are refused. Everything is on disk before config.json goes, the old one first and the new one last.
"""
