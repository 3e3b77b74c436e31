// What torch's C++ asks of a device before it traces or differentiates tensors that are fake, and
// on a GPU: whether there is one, and which one is current. A torch built for the CPU has no answer,
// and one built for CUDA would ask the driver. Loaded before torch, which looks for hooks once.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;

struct NullGuard final : c10::impl::DeviceGuardImplInterface {
  static Device first() { return Device(DeviceType::CUDA, 0); }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return first(); }
  Device exchangeDevice(Device) const override { return first(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, first()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, first()); }
  DeviceIndex deviceCount() const noexcept override { return 2; }
};

struct NullHooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 2; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  long versionCuDNN() const override { return 99999; } // as new as torch may ask for
  long versionRuntimeCuDNN() const { return 99999; } // (none in torch 2.8)
};

// The hooks are registered as soon as this library is loaded.
static int hooked = [] {
  auto make = [](at::CUDAHooksArgs) { return std::make_unique<NullHooks>(); };
  at::CUDAHooksRegistry()->Register("CUDAHooks", make, c10::REGISTRY_PREFERRED);
  return 0;
}();

// To be called once torch is there: the last of these guards is the one that counts.
extern "C" void null_guard() {
  static NullGuard guard;
  static c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);
}
