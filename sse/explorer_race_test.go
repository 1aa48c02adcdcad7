//go:build race

package sse

// scopeDepth is how deep the explorer plays every order of few moves. The race detector makes each
// order ten times slower.
const scopeDepth = 5
