docker run --rm --name=ViT_b16 \
  --gpus=all \
  --shm-size=16g --ulimit=memlock=-1 --ulimit=stack=67108864 \
  --stop-timeout=120 \
  --user "$(id -u):$(id -g)" \
  --volume /home/me:/home/me \
  --volume /data:/data:ro \
  --workdir /home/me \
  --env 'A=b c' \
  pretrain \
  launch node b16.yaml --ranks-per-node 8
