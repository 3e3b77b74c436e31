// What torch's C++ asks of a device before it traces or differentiates tensors that are fake, and
// on a GPU: which one is current. A torch built for the CPU has no answer, and one built for CUDA
// would ask the driver.
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device, c10::DeviceType, c10::Stream;

struct Null final : c10::impl::DeviceGuardImplInterface {
  static Device first() { return Device(DeviceType::CUDA, 0); }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return first(); }
  Device exchangeDevice(Device) const override { return first(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, first()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, first()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
};

static Null null;
static c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &null);
