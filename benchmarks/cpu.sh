#!/usr/bin/env bash
# The rows that CPU goals are stated for, smallest first; one thread, on a machine that does nothing else, about half an
# hour. A file that is there is done; a command that was stopped goes on where it was. benchmarks/cpu.sh [NAME...]
# measures the named ones alone.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
only=("$@")

row() { # name, then settings of vit2dpe bench
    local name=$1 out=benchmarks/results/cpu/$1.json
    shift
    if ((${#only[@]})) && [[ " ${only[*]} " != *" $name "* ]]; then return; fi
    if [[ -e $out ]]; then return; fi
    echo "== $name"
    python -m vit2dpe bench --out "$out.part" "$@" && mv "$out.part" "$out"
}

bias='vit_relpos_small_patch16_224(rel_pos_type=bias)'
rope=vit_small_patch16_rope_224
mixed=vit_small_patch16_rope_mixed_224
swin=swin_tiny_patch4_window7_224

# Counts and bytes, without a clock.
row rope_counts --models $rope --modes inference,training --batch 1 --repeats 0
row table_448_bytes --models "$bias" --sizes 448 --modes training --batch 1 --repeats 0
row table_1024_bytes --models "$bias" --sizes 1024 --modes inference --batch 1 --repeats 0
# Modules and tables: seconds each.
row mixed_table --models $mixed --level table --modes inference
row mixed_table_training --models $mixed --level table --modes training --least 2
row rope_attention --models $rope --level attention --depth 2 --batch 8 --modes inference --least 1.15
row rope_attention_training --models $rope --level attention --depth 2 --batch 8 --modes training --least 1.12
row rotation --models $rope,$mixed,rotary_embedding_torch,x_transformers --level op --depth 2 --batch 8
row rope_block --models $rope --level block --depth 2 --batch 8
row swin_attention --models "$swin,$swin(fused=true),torchvision_swin_t" --level attention --block 1 --modes inference --least 1.10
row swin_attention_training --models "$swin,$swin(fused=true),torchvision_swin_t" --level attention --block 1 --modes training --least 1
row swin_attention_stage3 --models $swin --level attention --block 5 --modes inference,training
row first --models "$rope,$bias" --modes first --batch 1 --depth 4
# Whole models.
row rope --models $rope --modes inference --least 1.04 --most 1.01
row rope_bfloat16 --models $rope --modes inference --precision bfloat16 --most 1.03
row mixed --models $mixed --modes inference --least 1.03
row table_448 --models "$bias" --sizes 448 --depth 4 --batch 1 --modes inference --least 1.35
row swin --models "$swin,$swin(fused=true),torchvision_swin_t" --batch 1 --modes inference --least 1
row rope_training --models $rope --modes training --least 1.03
row mixed_training --models $mixed --modes training --least 1.03
row table_training --models "$bias" --modes training --least 1.05
row table_448_training --models "$bias" --sizes 448 --depth 4 --batch 1 --modes training --least 1.15
row others --models vit_small_patch16_224,vit_small_patch16_rope_ape_224,vit_small_patch16_dinov3,vit_srelpos_small_patch16_224,vit_relpos_small_patch16_224,eva02_tiny_patch14_224 --depth 4 --modes inference,training --least 1
row beit --models beit_base_patch16_224 --depth 2 --batch 1 --least 1
row rectangle --models "$rope,$bias" --sizes 160x320 --depth 4 --modes inference --least 1
row cifar --models "$rope(patch_size=4)" --sizes 32 --depth 4 --batch 8 --least 1
row kept --models "$rope(patch_drop_rate=0.75)" --depth 4 --batch 8 --modes training --least 1
row swin_training --models $swin,torchvision_swin_t --batch 1 --modes training --least 1
row table_1024 --models "$bias" --sizes 1024 --depth 1 --batch 1 --modes inference --least 1.7
text=x_transformers_text
row x_transformers --models x_transformers_vit --depth 4 --batch 4 --least 1
row x_transformers_text --models "$text,$text(rel_pos_bias=true),$text(alibi_pos_bias=true)" --sizes 1x256 --depth 4 --batch 4 --least 1
row transformers --models transformers_vitmae,transformers_dinov3 --depth 4 --batch 4 --least 1
row compiled --models "$rope,$bias" --level attention --depth 2 --batch 8 --compile --modes inference
