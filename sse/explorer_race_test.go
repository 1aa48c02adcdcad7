//go:build race

package sse

// scopeDepth is how deep the explorer plays every order of few moves. With the race detector each takes ten times as long.
const scopeDepth = 5
