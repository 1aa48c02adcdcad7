//go:build !linux

package limit

import (
	"net"
	"time"
)

func setUnsent(*net.TCPConn, time.Duration) {}
