"""CLIP, ViT-B/16, from scratch on CC3M by the contrastive loss alone: a start of one's own.

    clipbench train clip_vitb16_cc3m --data cc3m --nproc 8 --register clip-vitb16-cc3m

To see what experts' labels are worth without 400 M pairs before them: --start clip-vitb16-cc3m for the other recipes.
Time: not measured; --dry-run estimates it on the machine at hand. Expected score: none of ours yet.

Marks: [CN] the recipe of the code base that the paper was built in · [own] our choice.
"""

# --- knobs ------------------------------------------------------------------------------------------------------------
epochs = 30  # [own]
samples = 2_900_000  # [own] of CC3M that can still be fetched; only sets the number of steps
batch_size = 4096  # [own] pairs over all processes: 64 on each of 64 GPUs, 512 on each of 8
steps = epochs * samples // batch_size

# --- what is trained --------------------------------------------------------------------------------------------------
model = dict(
    source="openclip:ViT-B-16",  # random weights
    gradient_checkpointing=True,  # [CN]
)
data = dict(  # --data names the shards, labelled or not
    captions=dict(alt=1.0),
    workers=8,
)
losses = dict(
    contrastive="clip",
)
augmentation = dict(
    scale=(0.9, 1.0),  # [CN]
    flip=0.0,  # [CN]
    range_augment=dict(psnr=(40.0, 20.0)),  # [CN]
)
resolution = dict(size=224, sizes=(160, 192, 224, 256, 288, 320))  # [CN]

# --- how --------------------------------------------------------------------------------------------------------------
optimizer = dict(
    lr=5e-4,  # [CN]
    min_lr=1e-6,  # [CN]
    warmup_steps=min(1000, steps // 10),  # [CN] 1,000
    betas=(0.9, 0.98),  # [CN]
    eps=1e-6,  # [CN]
    weight_decay=0.2,  # [CN]
)
precision = "bf16"  # [own] mixed precision: [CN]
ema = 5e-4  # [CN]
chunks = 1  # more of them where memory is short: the same gradients

# --- what never changes a weight --------------------------------------------------------------------------------------
checkpoint_interval = 500
log_interval = 50
