"""The long jobs that are stopped, and what each of them must leave behind."""

from dataclasses import dataclass

PEOPLE = "synthetic:domain=a,num_ids=4,images_per_id=4"
TARGET = "synthetic:domain=b,num_ids=2,images_per_id=4"
SMALL = "--resolution 64 32 --train_batch_size 8 --eval_every 99"
TRAINED = f"--source {PEOPLE} --target {TARGET} {SMALL} --checkpointing_steps 1 --resume_from_checkpoint latest"
CLUSTERS = "--images_per_id 2 --steps_per_epoch 3 --cluster_k1 6 --cluster_k2 2 --eps 0.5 --min_samples 2 "
CLUSTERS += "--lr_warmup_epochs 0"
DRAWN = f"--source {PEOPLE} --resolution 64 32 --max_train_steps 2 --num_images 2 --num_reference_images 2 "
DRAWN += "--num_inference_steps 2 --train_batch_size 2 --save_resolution 64 32 --clip_model_name_or_path none"
# Each way to adapt that keeps more than clusters: teachers, queues, parts, stages, labels that move.
ADAPTED = f"adapt_reid --target {PEOPLE.replace('=a,', '=b,')} {SMALL} {CLUSTERS} --steps_per_epoch 2 --jaccard faiss "
ADAPTED += "--checkpointing_steps 1 --resume_from_checkpoint latest --output_dir {out} "
FROM_SOURCE = f"--setting adaptation --source {PEOPLE} "
ADAPTERS = {
    "hhcl": "--method hhcl",
    "pplr": "--method pplr",
    "ice": "--method ice --norm_group 4",
    "cacl": f"{FROM_SOURCE} --method cacl",
    "unrn": f"{FROM_SOURCE} --method unrn --source_steps 1 --queue_size 12 --norm_group 4",
    "glt": f"{FROM_SOURCE} --method glt --source_steps 1 --group_counts 2 3",
    "hcd": f"{FROM_SOURCE} --method hcd",
    "spcl": "--method spcl",
    "idm": f"{FROM_SOURCE} --method idm --mix_stage 1",
}
# Trainings of one script each: what they keep beside weights are teachers, domains, prompts that were learned first.
OTHERS = {
    "dino": ("pretrain_backbone", "--objective dino --local_crops 1 --prototypes 16 --head_width 16", "backbone"),
    "solider": (
        "pretrain_backbone",
        "--objective solider --local_crops 1 --prototypes 16 --head_width 16 --from_scratch",
        "backbone",
    ),
    "metabin": ("finetune_reid", "--setting generalisation --method metabin", "model"),
    "meta": ("finetune_reid", "--setting generalisation --method meta", "model"),
    "muva": ("train_dcac", "--encoder muva --diffusion none --muva_epochs 5", "model"),
}
DOMAINS = " ".join(PEOPLE.replace("=a,", f"={domain},") for domain in "acd")
SEARCH = "evaluate --model {inputs}/clip --resolution 64 32 --batch_size 4 --report_queries 0 --output_dir {out} "
KEPT = f"{SEARCH} --query_dir {{inputs}}/people/query --gallery_features {{out}}/index --gallery_dir {{inputs}}/people"
SCORED = "--num_train_epochs 1 --classifier_epochs 1 --train_batch_size 8 --eval_batch_size 8 --resolution 64 32 "
SCORED += "--dataloader_num_workers 0 --keep_fraction 0.5"


@dataclass
class Job:
    """`{inputs}` and `{out}` in the command are folders; `done` matches the files of finished work.

    `once`: the folder appears when it is complete, and the same command then refuses it. `before` is the command that
    makes the folder which the job goes on from. `epochs`: a training needs at least so many.
    """

    command: str
    done: str
    result: tuple
    trains: bool = False
    once: bool = False
    before: str = ""
    epochs: int = 0


JOBS = {
    "dcac": Job(
        f"train_dcac {TRAINED} --diffusion_resolution 64 64 --validation_ids 0 --cache_dir {{inputs}}/cache "
        "--output_dir {out}",
        "checkpoint-*/files.json",
        ("log.jsonl", "model/model.safetensors", "prompts.safetensors"),
        trains=True,
    ),
    "pretrain": Job(
        f"pretrain_backbone {TRAINED} --output_dir {{out}}",
        "checkpoint-*/files.json",
        ("log.jsonl", "backbone/model.safetensors"),
        trains=True,
    ),
    "finetune": Job(
        f"finetune_reid {TRAINED} --output_dir {{out}}",
        "checkpoint-*/files.json",
        ("log.jsonl", "model/model.safetensors"),
        trains=True,
    ),
    "adapt": Job(
        f"adapt_reid --target {PEOPLE.replace('=a,', '=b,')} {SMALL} {CLUSTERS} --checkpointing_steps 1 "
        "--resume_from_checkpoint latest --output_dir {out}",
        "checkpoint-*/files.json",
        ("log.jsonl", "model/model.safetensors"),
        trains=True,
    ),
    "captions": Job(
        f"train_dreambooth_reid {DRAWN} --captions_only --output_dir {{out}}",
        "identities/*/*/captions.json",
        ("captions.parquet",),
    ),
    "images": Job(
        f"train_dreambooth_reid {DRAWN} --output_dir {{out}}",
        "identities/*/*/images.json",
        ("metadata.parquet", "captions.parquet", "images/*/*/*.jpg"),
    ),
    "filter": Job(
        f"filter_generated --source {PEOPLE} --generated {{inputs}}/drawn {SCORED} --output_dir {{out}}",
        ".pieces/*.parquet",
        ("features.npy", "dataset/**/*.parquet"),
    ),
    "evaluate": Job(
        "evaluate --model {inputs}/clip --resolution 64 32 --data synthetic:domain=b,num_ids=16 --batch_size 4 "
        "--report_queries 0 --output_dir {out}",
        "chunks-*/*.safetensors",
        ("features.safetensors", "rankings.csv"),
    ),
    "latents": Job(
        "benchmarks.robustness.runner --latents {out}", "latents/*/*.safetensors", ("latents/*/*.safetensors",)
    ),
    "export": Job(
        "utils.datasets synthetic:domain=a,num_ids=16,images_per_id=4 --save_to {out}",
        "dataset_dict.json",
        ("dataset_dict.json", "*/data-*.arrow"),
        once=True,
    ),
    "dcac-captions": Job(
        f"train_dcac {TRAINED} --prompt_init captions --prompt_tokens all --diffusion_resolution 64 64 "
        "--validation_ids 0 --cache_dir {inputs}/cache --output_dir {out}",
        "checkpoint-*/files.json",
        ("log.jsonl", "model/model.safetensors", "prompts.safetensors", "captions.parquet"),
        trains=True,
    ),
    "part-masks": Job(
        "utils.datasets.part_masks synthetic:domain=a,num_ids=16,images_per_id=4 --out {out}/masks.safetensors",
        "masks.safetensors.parts/*/*.safetensors",
        ("masks.safetensors",),
    ),
    "group": Job(
        f"{SEARCH.replace('--report_queries 0', '')} --group_dir {{inputs}}/people",
        "chunks-*/*.safetensors",
        ("group_features.safetensors", "identities.csv"),
    ),
    "append": Job(
        f"{KEPT}/gallery --append",
        "index/*.safetensors",
        ("index/*.safetensors", "index/manifest.json", "rankings.csv"),
        before=f"{KEPT}/part",
    ),
    "redraw": Job(
        f"train_dreambooth_reid {DRAWN} --save_adapters --output_dir {{out}} --redraw --num_images 4",
        "images/*/*/*.jpg",
        ("metadata.parquet", "images/*/*/*.jpg"),
        before=f"train_dreambooth_reid {DRAWN} --save_adapters --output_dir {{out}}",
    ),
    **{
        f"adapt-{name}": Job(
            ADAPTED + words,
            "checkpoint-*/files.json",
            ("log.jsonl", "model/model.safetensors"),
            trains=True,
            epochs=3 if name == "cacl" else 4 if "--source " in words else 0,
        )
        for name, words in ADAPTERS.items()
    },
    **{
        name: Job(
            f"{script} {TRAINED.replace(PEOPLE, DOMAINS) if 'generalisation' in words else TRAINED} {words} "
            "--output_dir {out}",
            "checkpoint-*/files.json",
            ("log.jsonl", f"{saved}/model.safetensors"),
            trains=True,
        )
        for name, (script, words, saved) in OTHERS.items()
    },
}  # fmt: skip
