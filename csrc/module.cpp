// The module object that lets Python import a library of registered operators. The operators register
// themselves when the library is loaded; the module itself is empty.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* BITNET_EXT_MODULE_INIT() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   BITNET_EXT_MODULE_NAME,
                                   nullptr,
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}
