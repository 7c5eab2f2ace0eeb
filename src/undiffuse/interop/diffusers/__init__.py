"""The folders of diffusers: a ``model_index.json`` and a folder for each part, read into a :class:`.Pipeline`.

    schedulers.py   what a scheduler's file means: schedule, prediction, label, solver, grid
    networks.py     diffusers' modules called as a denoiser calls its network
    texts.py        tokenizers and text encoders as conditions
    codecs.py       its autoencoders as codecs
    folder.py       what may be read of a folder, and what may not
    families.py     which parts a pipeline of theirs has, and how they are put together
    load.py         reading and writing

The modules and their weights are diffusers' and transformers' own (the extra ``[diffusers]``); schedule, prediction,
guidance, solvers, grids, noise and everything above them are ours.
"""
