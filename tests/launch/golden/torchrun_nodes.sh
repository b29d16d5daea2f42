/env/bin/python -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint n1:24994 --rdzv-id b16 --max-restarts 3 -m pretrain train b16.yaml --seed 1
