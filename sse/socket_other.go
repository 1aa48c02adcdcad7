//go:build !linux

package sse

import "net/http"

// hijack takes over no connections except on Linux: elsewhere viewers wait in their handlers.
func (h *Hub) hijack(http.ResponseWriter, *http.Request) (socket, bool) { return nil, false }

type departures struct{}

func (d *departures) close() {}
