// Stands in for libnvrtc: it "compiles" a kernel to an image that names it, for tests of all that
// is around the compiler. An expression with "broken" in it does not compile.
#include <chrono>
#include <cstring>
#include <string>
#include <thread>

namespace {

struct Program {
  std::string source, name, image, log;
};

int compiled;

int give(const std::string& text, char* to) {
  std::memcpy(to, text.data(), text.size());
  return 0;
}

}  // namespace

extern "C" {

int programs_compiled() { return compiled; }  // for tests

const char* nvrtcGetErrorString(int) { return "NVRTC_ERROR_COMPILATION"; }
int nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 0;
  return 0;
}
int nvrtcGetNumSupportedArchs(int* number) {
  *number = 3;
  return 0;
}
int nvrtcGetSupportedArchs(int* archs) {
  const int known[] = {80, 90, 100};
  std::memcpy(archs, known, sizeof(known));
  return 0;
}
int nvrtcCreateProgram(Program** program, const char* source, const char*, int, const char**,
                       const char**) {
  *program = new Program{source, "", "", ""};
  return 0;
}
int nvrtcDestroyProgram(Program** program) {
  delete *program;
  return 0;
}
int nvrtcAddNameExpression(Program* program, const char* name) {
  program->name = name;
  return 0;
}
int nvrtcCompileProgram(Program* program, int count, const char** options) {
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // so that threads meet here
  ++compiled;
  program->image = program->source + program->name;
  for (int i = 0; i < count; ++i) program->image += std::string("\n") + options[i];
  if (program->name.find("broken") == std::string::npos) return 0;
  program->log = "kernel.cu(1): error: broken";
  return 6;
}
int nvrtcGetProgramLogSize(Program* program, size_t* size) {
  *size = program->log.size();
  return 0;
}
int nvrtcGetProgramLog(Program* program, char* to) { return give(program->log, to); }
int nvrtcGetLoweredName(Program* program, const char*, const char** symbol) {
  *symbol = program->name.c_str();
  return 0;
}
int nvrtcGetCUBINSize(Program* program, size_t* size) {
  *size = program->image.size();
  return 0;
}
int nvrtcGetCUBIN(Program* program, char* to) { return give(program->image, to); }
int nvrtcGetPTXSize(Program* program, size_t* size) { return nvrtcGetCUBINSize(program, size); }
int nvrtcGetPTX(Program* program, char* to) { return give(program->image, to); }

}  // extern "C"
