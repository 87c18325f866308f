#pragma once

// Marks what libstableedit exports; everything else is hidden.
#if defined(_WIN32)
#if defined(STABLEEDIT_BUILDING)
#define STABLEEDIT_API __declspec(dllexport)
#else
#define STABLEEDIT_API __declspec(dllimport)
#endif
#else
#define STABLEEDIT_API __attribute__((visibility("default")))
#endif
