# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.12.0",
#     "bitsandbytes>=0.50.0",
#     "datasets>=4.5.0",
#     "diffusers>=0.38.0",
#     "huggingface_hub>=1.20.0",
#     "jinja2>=3.1.4",
#     "matplotlib>=3.9.0",
#     "numpy>=2.1.0",
#     "peft>=0.19.0",
#     "Pillow>=11.0.0",
#     "safetensors>=0.7.0",
#     "scikit-learn>=1.5.2",
#     "scipy>=1.14.1",
#     "torch>=2.11.0",
#     "torchvision>=0.26.0",
#     "tqdm>=4.67.0",
#     "transformers>=5.17.0",
#     "triton>=3.6.0",
# ]
# ///
