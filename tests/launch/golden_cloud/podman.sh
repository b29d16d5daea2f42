podman run --rm --name=ViT_b16 \
  --shm-size=16g --ulimit=memlock=-1 --ulimit=stack=67108864 \
  --stop-timeout=120 \
  --user "$(id -u):$(id -g)" --userns=keep-id \
  --volume /home/me:/home/me \
  --workdir /home/me \
  pretrain \
  launch node b16.yaml --ranks-per-node 2
