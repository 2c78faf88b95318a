"""`revelio llava pretrain` as a script for launchers: `deepspeed scripts/pretrain.py --config FILE`."""

from llava_ext.cli import run_script

if __name__ == "__main__":
    run_script("pretrain")
