// Starts the program where CMake builds it; cargo starts it from main.rs.
#include "serve.hpp"

int main(int argc, char** argv) { return serve::serve_main({argv + (argc > 0), argv + argc}, SERVE_MODEL_DIR); }
