"""What users of timm, transformers, torchvision, MAE, Swin, DINOv2 and torch's own Transformer need.

Each row is a need and the public report it was met in: the rows of `pytest tests/needs --board`. `A1a` is a
sibling of `A1`: the same cause somewhere else.
"""

NEEDS = {
    # Core
    "A1": ("gradients of gradients where blocks share a table", "NATTEN#191, composer#6, learn2learn#429"),
    "A2": ("squared ALiBi beside any table", "pairs of encodings"),
    "A3": ("check_encoding passes what is right", "fixed and learned parts in one encoding"),
    "A4": ("check_encoding takes an instance, a class, a builder", "an author's encoding"),
    "A5": ("contexts belong to their thread or task", "servers with threads"),
    "A6": ("maps of one model while others run", "notebooks with two models"),
    "A7": ("timm knows our names in any order of imports", "timm.create_model"),
    "A8": ("each cell of a study keeps its device and precision", "studies over two machines"),
    "A9": ("places that a table does not have are refused on a GPU too", "device-side assert"),
    "A10": ("no float64 and nothing of another device on MPS", "transformers#46159, diffusers#11315"),
    "A11": ("rotary on three axes at head widths 64 and 128", "video models"),
    "A12": ("golden directions on three axes", "the source's directions"),
    "A13": ("a LookHere query that may look at nothing", "LookHere"),
    # Models and checkpoints
    "B1": ("original files that timm reads", "dinov2#120, #270, #321, timm#2014"),
    "B2": ("a trained table stays when its encoding is named", "transformers#35411, dinov2#270"),
    "B3": ("vision checkpoints of transformers and torchvision", "transformers#26219, tao-pytorch#87, DEIMv2#68"),
    "B4": ("other channels and classes than the file's", "timm#2445, #2780, torchgeo#2324"),
    "B5": ("a timm model that was built by its class", "VisionTransformer(...)"),
    "B6": ("a timm model that pads images of any size", "dynamic_img_pad"),
    "B7": ("every timm name is read, or refused with the reason", "ViTamin and 560 others"),
    "B8": ("weights of wrapped models", "timm#2003, nanoGPT#325"),
    "B9": ("the rest of timm's ViT: masks, causal attention, attributes", "timm#2686, dinov3#112"),
    "B10": ("weights of torch's own Transformer, in and out", "nn.TransformerEncoder, nn.TransformerDecoder"),
    "B11": ("a Swin of timm at a size that windows do not divide", "README: the same function"),
    "B12": ("an optimizer that was made before another input size", "set_input_size"),
    "B13": ("int8 by torchao without a filter", "torchao.quantize_"),
    "B14": ("fewer heads of keys under frequencies of each head", "grouped queries"),
    "B15": ("a model that came from timm is saved and read back", "save_for_hf, local-dir:, run folders, validate.py"),
    # Export, tracing
    "C1": ("ONNX of a Swin with a free batch", "timm#1844, Swin#301"),
    "C2": ("torch.jit.trace, and operations that converters have", "coremltools#1747, dinov2#102"),
    "C3": ("ONNX outside of no_grad", "ConversionError"),
    "C4": ("graphs of a compiled model over sizes", "torch.compile"),
    # Training, data, command line
    "D1": ("resume with another batch size", "stylegan-xl#92, OLMo#182"),
    "D2": ("class folders in the order of the checkpoint", "timm#222, vision#714"),
    "D3": ("a folder's validation split is found", "roboflow-python#153"),
    "D4": ("two run folders of one name in Weights & Biases", "run ids"),
    "D5": ("a part of a batch in which nothing counts", "accumulated masked tokens"),
    "D6": ("GPT-2's initialization by the depth of every model", "Swin, MAE"),
    "D7": ("ranks wait while one of them translates", "accelerate#3861"),
    "D8": ("labels that are no class", "test sets without labels"),
    "D9": ("pretraining on images alone", "mae#170, #143"),
    "D10": ("resume after the cache was decided otherwise, and on another host", "preempted jobs"),
    "D11": ("a study on class folders alone", "no train folder"),
    "D12": ("images that Pillow reads", "PhotoMapAI#364"),
    "D13": ("numbers and lists in YAML where they mean the same", "size: 32"),
    "D14": ("defaults fit the epochs that were asked for", "--optim.epochs 3"),
    "D15": ("every setting has its range", "--model.heads 0"),
    "D16": ("help that is piped into head", "BrokenPipeError"),
    "D17": ("a recipe given to another command", "--config"),
    "D18": ("a tokenizer and --smoke together", "--data.tokenizer bpe"),
    "D19": ("a prediction for one image or one line", "timm#1817, pycls#95"),
    "D20": ("labels in a CSV, balanced sampling, numbers by class", "classification of one's own images"),
    # Text and torch's own Transformer
    "E1": ("a short text beside a long one", "Qwen#401, transformers#25104"),
    "E2": ("left-padded generation beyond the context", "batched generation"),
    "E3": ("a stack of torch's layers with rotation and token terms", "nn.TransformerEncoder"),
    "E4": ("an encoder-decoder learns with its default encoding", "reversed sequences"),
    "E5": ("special tokens in masked language modelling", "BERT"),
    "E6": ("export of a text model at any length", "torch.export"),
    "E7": ("masks of each sample, and a lone MultiheadAttention", "nn.MultiheadAttention"),
    "E8": ("texts packed without a dense mask", "varlen"),
    # Looking inside
    "F1": ("a table of depth and encoding for images", "--depths"),
    "F2": ("pictures of a trained encoding", "show --run"),
    "F3": ("maps of a model that is not ours", "attention_maps(timm_model)"),
    "F4": ("letters of other scripts in pictures", "missing glyphs"),
}

OPEN = {
    **dict.fromkeys(["D3", "D9", "D11", "D12", "D19", "D20"], "open, issue 17"),
    **dict.fromkeys(["A8", "A9"], "open, issue 19"),
    "A11": "open, issue 20",
    "E8": "open, issue 21",
    "B3": "open, issue 22",
}
