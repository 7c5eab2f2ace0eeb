"""A model of undiffuse as a pipeline of diffusers:

    pipeline = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    images = pipeline(4, num_inference_steps=20).images

The network, its schedule and its solvers are those of undiffuse (pip install undiffuse), read from ``undiffuse/``.
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image


class UndiffusePipeline(DiffusionPipeline):  # type: ignore[misc]
    """Samples from the model in ``undiffuse/`` of its folder."""

    def __init__(self):
        super().__init__()
        self.model = None

    def load(self):
        """The model as undiffuse has it."""
        if self.model is None:
            import undiffuse

            folder = Path(self.config._name_or_path)
            if not folder.is_dir():
                from huggingface_hub import snapshot_download

                folder = Path(snapshot_download(str(folder), allow_patterns=["undiffuse/*"]))
            self.model = undiffuse.Pipeline.load(folder / "undiffuse")
        return self.model

    @torch.no_grad()
    def __call__(self, batch_size=1, *, seed=0, num_inference_steps=None, output_type="pil", return_dict=True, **asked):
        """``asked``: classes, prompts, guidance_scale, solver and all else that ``undiffuse.Pipeline.sample`` takes."""
        model = self.load()
        if num_inference_steps is not None:
            asked["steps"] = num_inference_steps
        images = model.sample(batch_size, seed=seed, **asked)
        if output_type == "pil":
            images = [Image.fromarray(image) for image in model.spec.to_images(model.spec.to_model(images))]
        return ImagePipelineOutput(images=images) if return_dict else (images,)
