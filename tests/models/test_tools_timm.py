"""timm's scripts, its record of a model, and hub folders: what they do with their own models they do with ours."""

import json
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from timm.models import get_model_args, get_model_traits, load_checkpoint, resolve_model_input_args, save_for_hf

import vit2dpe
from tests.helpers import shaken
from vit2dpe import timm as wrapper

NAME = "vit2dpe_tiny_patch4_32"
MICRO = dict(embed_dim=48, depth=2, num_heads=3)
# What timm's validate.py does, in its order: arguments, model, data config, loader, evaluation, a line of JSON.
SCRIPT = """
import argparse, json, sys
import helper_of_the_script
import torch
from timm.data import create_dataset, create_loader, resolve_input_data_config
from timm.models import create_model, load_checkpoint, resolve_model_input_args
from timm.utils import ParseKwargs, accuracy

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--data-dir")
    parser.add_argument("--img-size", type=int, default=None)
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    args = parser.parse_args()
    model = create_model(**resolve_model_input_args(
        args.model, vars(args), pretrained=args.pretrained, num_classes=2, global_pool=None, **args.model_kwargs))
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint)
    config = resolve_input_data_config(model, vars(args), use_test_size=True)
    dataset = create_dataset("", args.data_dir, split="val")
    loader = create_loader(dataset, batch_size=4, use_prefetcher=False, num_workers=0, **config)
    model.eval()
    n, shape = 0, None
    with torch.inference_mode():
        for images, labels in loader:
            logits = model(images)
            accuracy(logits, labels, topk=(1,))
            n, shape = n + len(labels), list(images.shape[1:])
    print("--result", json.dumps(dict(
        n=n, shape=shape, position=type(model.position).__name__, argv=sys.argv[1:3], depth=len(model.blocks),
        mean=config["mean"], logits=logits.tolist())))

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "helper_of_the_script.py").write_text("")
    path = tmp_path / "validate.py"
    path.write_text(textwrap.dedent(SCRIPT))
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        for j in range(3):
            Image.new("RGB", (40, 36), (90 * i, 60 * j, 0)).save(tmp_path / "data" / "val" / name / f"{j}.png")
    return path


def test_a_script_of_timm_sees_our_names(script):
    arguments = ["--model", NAME, "--data-dir", str(script.parent / "data"), "--img-size", "48", "--model-kwargs"]
    kwargs = ["position=rope", *(f"{k}={v}" for k, v in MICRO.items())]
    done = subprocess.run(
        [sys.executable, "-m", "vit2dpe.timm", str(script), *arguments, *kwargs],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--result" in done.stdout
    said = done.stdout.split("--result")[1]
    for part in ('"n": 6', '"shape": [3, 48, 48]', '"AxialRoPE"', f'"argv": ["--model", "{NAME}"]', '"depth": 2'):
        assert part in said


def read_by(script, capsys, *arguments):
    """What the script says, of its last batch too: two images of dogs."""
    wrapper.main([str(script), "--data-dir", str(script.parent / "data"), *arguments])
    return json.loads(capsys.readouterr().out.split("--result")[1])


@pytest.mark.need("B15")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of timm's reader of folders
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("position", ["learned+rope", None])
def test_a_script_of_timm_reads_what_came_from_timm(script, capsys, position):
    """Its folder, and its name with a file; the images that the script cuts are those of the base's record."""
    base, sizes = "vit_base_patch16_siglip_224", dict(embed_dim=48, depth=2, num_heads=3, num_classes=2)
    model = shaken(vit2dpe.from_timm(base, position, img_size=32, **sizes))
    folder = script.parent / "model"
    save_for_hf(model, folder, safe_serialization=True)
    config = resolve_input_data_config(model, use_test_size=True) | dict(input_size=(3, 32, 32))
    transform = create_transform(**config)
    files = sorted((script.parent / "data" / "val" / "dog").iterdir())[1:]
    images = torch.stack([transform(Image.open(file)) for file in files])
    with torch.inference_mode():
        expected = model(images).tolist()
    found = read_by(script, capsys, "--model", f"local-dir:{folder}", "--pretrained", "--img-size", "32")
    assert found["logits"] == expected
    assert (found["mean"], found["shape"]) == ([0.5, 0.5, 0.5], [3, 32, 32])
    kwargs = [f"base={base}", *([f"position={position}"] if position else []), "img_size=32"]
    kwargs += [f"{key}={value}" for key, value in sizes.items() if key != "num_classes"]
    file = str(folder / "model.safetensors")
    named = ["--model", "vit2dpe_from_timm", "--checkpoint", file, "--img-size", "32", "--model-kwargs", *kwargs]
    assert read_by(script, capsys, *named) == found


def test_without_the_wrapper_the_name_is_unknown(script):
    done = subprocess.run(
        [sys.executable, str(script), "--model", NAME], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert f"Unknown model ({NAME})" in done.stderr


# What timm's train.py does, in its order: overlay file, layer decay, averaged weights, saver, resume.
TRAIN = """
import argparse
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model, load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, ParseKwargs, random_seed

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--data-dir")
    parser.add_argument("--output")
    parser.add_argument("--resume", default="")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    args = parser.parse_args()
    random_seed(7)
    model = create_model(args.model, num_classes=2, drop_path_rate=0.1, **args.model_kwargs)
    model.set_grad_checkpointing()
    config = resolve_data_config(vars(args), model=model)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    start = resume_checkpoint(model, args.resume, optimizer=optimizer) if args.resume else 0
    ema = ModelEmaV3(model, decay=0.5)
    if args.resume:
        load_checkpoint(ema.module, args.resume, use_ema=True)
    schedule, epochs = create_scheduler_v2(optimizer, num_epochs=start + 1, warmup_epochs=0, cooldown_epochs=0)
    dataset = create_dataset("", args.data_dir, split="val", is_training=True)
    loader = create_loader(dataset, batch_size=3, is_training=True, use_prefetcher=False, num_workers=0,
                           input_size=config["input_size"], mean=config["mean"], std=config["std"])
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=args.output,
                            recovery_dir=args.output)
    for epoch in range(start, epochs):
        for i, (images, labels) in enumerate(loader):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model, step=i)
        schedule.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=loss.item())
    print("--result", len(loader), epochs, loss.item() < 10)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("position", ["learned+logcpb"])
def test_training_in_the_order_of_timms_script_and_resuming_it(script, position):
    path, out = script.parent / "train.py", script.parent / "out"
    path.write_text(textwrap.dedent(TRAIN))
    out.mkdir()
    kwargs = [f"position={position}", "img_size=48", *(f"{k}={v}" for k, v in MICRO.items())]
    arguments = ["--model", NAME, "--data-dir", str(script.parent / "data"), "--output", str(out)]
    for more in ([], ["--resume", str(out / "last.pth.tar")]):
        done = subprocess.run(
            [sys.executable, "-m", "vit2dpe.timm", str(path), *arguments, *more, "--model-kwargs", *kwargs],
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "--result 2 2 True" in done.stdout, "two epochs in all"
    # Its file goes into a model of another size, by timm's loader.
    wide = timm.create_model(NAME, position=position, num_classes=2, **MICRO).eval()
    load_checkpoint(wide, str(out / "last.pth.tar"), use_ema=True)
    same = timm.create_model(NAME, position=position, num_classes=2, img_size=48, **MICRO).eval()
    load_checkpoint(same, str(out / "last.pth.tar"), use_ema=True)
    same.set_input_size(32)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(wide(x), same(x))


def test_the_wrapper_leaves_no_trace_and_passes_the_end_on(tmp_path):
    (tmp_path / "ends.py").write_text("import sys; assert __name__ == '__main__'; sys.exit(int(sys.argv[1]))")
    before = sys.argv, list(sys.path)
    with pytest.raises(SystemExit) as end:
        wrapper.main([str(tmp_path / "ends.py"), "7"])
    assert end.value.code == 7
    assert before == (sys.argv, sys.path)


def test_a_script_that_is_not_there(capsys):
    assert wrapper.main(["nowhere/train.py"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "there is no script nowhere/train.py" in said
    assert wrapper.main([]) == 2
    assert wrapper.main(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: python -m vit2dpe.timm") == 2


@pytest.mark.parametrize("position", ["learned", "windowed+rope", "factorized", "relative", "fire", "rope_mixed"])
def test_a_resized_model_comes_back_from_a_hub_folder(tmp_path, position):
    model = timm.create_model(NAME, position=position, img_size=(32, 48), num_classes=5, **MICRO).eval()
    model.set_input_size(img_size=(48, 64))
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.train_grid == model.train_grid == (12, 16)
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(("first", "then"), [("token", "avg"), ("avg", "token"), ("map", "avg"), ("token", "")])
def test_another_pooling_comes_back_from_a_hub_folder(tmp_path, first, then):
    model = timm.create_model(NAME, position="rope", global_pool=first, num_classes=7, **MICRO).eval()
    model.reset_classifier(3, global_pool=then)
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_timms_record_follows_and_leaves_rates_out():
    rates = dict(drop_rate=0.2, drop_path_rate=0.1, pos_drop_rate=0.1, patch_drop_rate=0.1, attn_drop_rate=0.1)
    model = timm.create_model(NAME, img_size=(32, 48), in_chans=4, num_classes=7, **MICRO, **rates)
    model.set_input_size(img_size=(48, 64))
    model.reset_classifier(5)
    args, traits = get_model_args(model), get_model_traits(model)
    assert not rates.keys() & args.keys()
    assert (args["img_size"], args["num_classes"], args["in_chans"]) == ((48, 64), 5, 4)
    assert (traits["img_size"], traits["num_classes"], traits["fixed_input_size"]) == ((48, 64), 5, False)
    asked = dict(in_chans=4, img_size=48, mean=(0.25,), std=(0.5,))
    built = timm.create_model(**resolve_model_input_args(NAME, asked, **MICRO))
    assert resolve_input_data_config(built, asked)["input_size"] == (4, 48, 48)


def test_an_encoding_given_as_a_module_is_not_saved_as_a_word(tmp_path):
    from vit2dpe.encodings import AxialRoPE

    model = timm.create_model(NAME, position=AxialRoPE(16), **MICRO)
    with pytest.raises(ValueError, match="'position' is not serializable"):
        save_for_hf(model, tmp_path)
