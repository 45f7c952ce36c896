"""Pipeline parallelism: the only folder that imports deepspeed."""
