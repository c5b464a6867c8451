#!/usr/bin/env bash
# Installs nvcc and the static CUDA runtime in a manylinux_2_28 image (AlmaLinux 8) from NVIDIA's packages.
# CUDA_VERSION: major and minor, such as 12.8; 13.0 by default.
set -euo pipefail
version="${CUDA_VERSION:-13.0}"
if [[ ! "$version" =~ ^[0-9]+\.[0-9]+$ ]]; then
  echo "CUDA_VERSION must be major and minor such as 13.0, got '$version'" >&2
  exit 1
fi
arch="$(uname -m)"
[[ "$arch" == aarch64 ]] && arch=sbsa
dnf -y install 'dnf-command(config-manager)'
dnf config-manager --add-repo "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$arch/cuda-rhel8.repo"
packages=("cuda-nvcc-${version/./-}" "cuda-cudart-devel-${version/./-}")
dnf -y install "${packages[@]}"
ln -sfn "/usr/local/cuda-$version" /usr/local/cuda
/usr/local/cuda/bin/nvcc --version
