#!/usr/bin/env bash
# Runs check_amx.cc, with the kernels as CMake builds them, under Linux on an emulated CPU that has
# AMX (Sapphire Rapids). It needs Debian, or what is like it, with curl, g++, cmake and make,
# and installs nothing: all of it lands in a folder, 500 MB.
#
#   tests/kernels/cpu/emulate_amx.sh [FOLDER]        by default build/amx
#
# The emulator is Bochs 3.0. It has AMX, but not all that Linux needs to lend tiles to processes,
# which emulate_amx.edits adds. The first run compiles it, in about ten minutes; others take two.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
repository=$(cd "$here/../../.." && pwd)
mkdir -p "${1:-$repository/build/amx}"
cd "${1:-$repository/build/amx}"
work=$PWD
mirror=http://deb.debian.org/debian
bochs_sha256=78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b

# Packages of Debian 13, unpacked into `root` with all that they depend on.
fetch_packages() {
  [ -e root/.done ] && return
  mkdir -p apt/etc/apt/{apt.conf.d,preferences.d} apt/var/lib/{dpkg,apt/lists/partial} \
    apt/var/cache/apt/archives/partial root
  : > apt/var/lib/dpkg/status
  local keys=/usr/share/keyrings/debian-archive-keyring.gpg
  echo "deb [signed-by=$keys] $mirror trixie main" > apt/etc/apt/sources.list
  cat > apt.conf << EOF
Dir "$work/apt";
Dir::State::status "$work/apt/var/lib/dpkg/status";
APT::Architecture "amd64";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
EOF
  export APT_CONFIG=$work/apt.conf
  apt-get -q update
  apt-get -q -y install --download-only \
    linux-image-cloud-amd64 busybox-static isolinux syslinux-common xorriso bochsbios vgabios
  for package in apt/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" root; done
  touch root/.done
}

# Each section of the edits is a script of sed for a file.
edit_emulator() {
  local edits=$here/emulate_amx.edits file
  for file in $(sed -n 's/^=== //p' "$edits"); do
    sed -n "\|^=== $file\$|,/^===/{/^===/d;p}" "$edits" | sed -i -f - "$file"
  done
}

build_emulator() {
  [ -e bochs-3.0/bochs ] && return
  curl -sSf -o bochs.tar.xz "$mirror/pool/main/b/bochs/bochs_3.0+dfsg.orig.tar.xz"
  echo "$bochs_sha256  bochs.tar.xz" | sha256sum --check --quiet
  rm -rf bochs-3.0
  tar -xf bochs.tar.xz
  (
    cd bochs-3.0
    edit_emulator
    ./configure --with-nogui --disable-docbook --disable-xpm --enable-all-optimizations \
      --enable-x86-64 --enable-avx --enable-evex --enable-amx \
      --enable-protection-keys CXXFLAGS=-O2 CFLAGS=-O2
    make -j2
  ) > bochs.build.log 2>&1
}

# The program, from the object files of the library.
build_check() {
  local sources=$repository/kernels/cpu
  cmake -S "$sources" -B kernels -DCMAKE_BUILD_TYPE=Release > kernels.log
  cmake --build kernels --parallel 2 >> kernels.log
  mapfile -t objects < <(find kernels/CMakeFiles/qcompile_cpu.dir -name '*.o')
  g++ -std=c++17 -O1 -static -pthread -I "$sources/include" -I "$sources/src" \
    "$here/check_amx.cc" "${objects[@]}" -o guest/check_amx
}

# A disc that boots a kernel with a file system in memory.
make_disc() {
  mkdir -p guest/{bin,dev,proc,sys} disc/isolinux
  cp root/usr/bin/busybox guest/bin/
  cat > guest/init << 'EOF'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox grep -m1 -o 'amx.*' /proc/cpuinfo
/check_amx count
/bin/busybox sleep 1
/bin/busybox poweroff -f
EOF
  chmod +x guest/init
  (cd guest && find . | bin/busybox cpio -o -H newc 2> ../cpio.log) > disc/initrd
  cp root/boot/vmlinuz-* disc/vmlinuz
  cp root/usr/lib/ISOLINUX/isolinux.bin root/usr/lib/syslinux/modules/bios/ldlinux.c32 disc/isolinux
  cat > disc/isolinux/isolinux.cfg << 'EOF'
default linux
label linux
  kernel /vmlinuz
  append initrd=/initrd console=ttyS0 quiet no5lvl panic=-1 mitigations=off
EOF
  root/usr/lib64/ld-linux-x86-64.so.2 --library-path root/usr/lib/x86_64-linux-gnu \
    root/usr/bin/xorriso -as mkisofs -quiet -o boot.iso -b isolinux/isolinux.bin \
    -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table disc 2> xorriso.log
}

boot() {
  cat > bochsrc << EOF
config_interface: textconfig
display_library: nogui
cpu: model=sapphire_rapids, ips=100000000
memory: guest=512, host=512
romimage: file=$work/root/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=$work/root/usr/share/vgabios/vgabios.bin
ata0-master: type=cdrom, path=$work/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/console.txt
clock: sync=none
log: $work/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
EOF
  rm -f console.txt
  # Switching the machine off ends the emulator as errors do.
  bochs-3.0/bochs -q -f bochsrc > bochs.out 2>&1 < /dev/null || true
  tr -d '\r' < console.txt
  grep -q '^PASSED' console.txt
}

fetch_packages
build_emulator
mkdir -p guest
build_check
make_disc
boot
