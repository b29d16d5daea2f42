"""The model card of a run: README.md, as the hub shows it."""

from __future__ import annotations

from pretrain import __version__, runfile
from pretrain.export.base import Trained

_CARD = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip, open_clip, zero-shot-image-classification]
---
# {name}

A dual encoder of images and texts, `{architecture}`, trained by pretrain {version}.

| | |
|---|---|
| weights | {weights}, after step {step:,} |
| image and text pairs seen | {samples:,} |
| pairs in a batch | {batch:,} |
| objective | {objective} |
| training data | {data} |
| images | {height} by {width} pixels, resized by `{mode}`, {interpolation} |
| features | {width_of_features} numbers, of length 1 |
| scale of the cosines | {scale:.4g}{bias} |

`parity.json` tells how these files were compared with the encoders they came from.

## Use

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:ORGANISATION/NAME")  # or "local-dir:FOLDER"
tokenizer = open_clip.get_tokenizer("hf-hub:ORGANISATION/NAME")
model.eval()
```

## The whole configuration

```yaml
{config}```
"""


def written(trained: Trained) -> str:
    """The card's text. Licence, intended use and limits of the data are for people to add."""
    encoder, run = trained.encoder, trained.run
    spec, bias = encoder.image_spec, encoder.towers.logit_bias
    return _CARD.format(
        name=run.name,
        architecture=encoder.architecture.name,
        version=__version__,
        weights="the moving average" if trained.average else "the last ones",
        step=trained.step,
        samples=trained.samples,
        batch=run.train.global_batch,
        objective=" + ".join(choice.name for choice in run.objective),
        data=", ".join(f"`{source}`" for source in run.data.train),
        height=spec.size[0],
        width=spec.size[1],
        mode=spec.resize_mode,
        interpolation=spec.interpolation,
        width_of_features=encoder.architecture.towers["embed_dim"],
        scale=float(encoder.towers.logit_scale.detach().exp()),
        bias="" if bias is None else f", bias {float(bias.detach()):.4g}",
        config=runfile.dump(run),
    )
