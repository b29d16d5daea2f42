mkdir -p /home/me/runs/b16/launch
cat > /home/me/runs/b16/launch/hostfile <<'HOSTS'
n1 slots=8
n2 slots=8
HOSTS
/env/bin/python -m deepspeed.launcher.runner --hostfile /home/me/runs/b16/launch/hostfile --master_port 24994 --master_addr n1 --node_rank "$NODE_RANK" --no_ssh --no_local_rank --module pretrain train b16.yaml --seed 1
