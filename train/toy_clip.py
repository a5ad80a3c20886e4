"""CLIP from scratch on toyworld: the start of the toy runs, minutes on a CPU.

    clipbench data toyworld data/toyworld --images 4000 --size 128 --seed 1
    clipbench train toy_clip --data data/toyworld/cc3m --register toy-clip

Trains a ViT of 2.8 M parameters and a small text tower on images and noisy captions, by the contrastive loss alone.
`toy_clip-ft` and `toy_cliptex` go on from it.
Time and score of this very recipe: not measured; `make effect` measures smaller ones.
Scores on toyworld say nothing about real images. Every number is our own choice.
"""

# --- knobs ------------------------------------------------------------------------------------------------------------
steps = 1000
batch_size = 64  # over all processes

# --- what is trained --------------------------------------------------------------------------------------------------
model = dict(source="openclip:local-dir:{here}/toy_vit")  # without weights: random ones
data = dict(captions=dict(alt=1.0), workers=2)  # --data names the shards
resolution = dict(size=128)

# --- how --------------------------------------------------------------------------------------------------------------
optimizer = dict(lr=1e-3, min_lr=1e-5, warmup_steps=steps // 10, weight_decay=0.1, clip_grad=1.0)

# --- what never changes a weight --------------------------------------------------------------------------------------
checkpoint_interval = 200
log_interval = 20
