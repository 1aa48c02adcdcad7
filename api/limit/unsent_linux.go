package limit

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// setUnsent sets how long the peer may accept nothing (tcp(7), TCP_USER_TIMEOUT).
func setUnsent(tcp *net.TCPConn, long time.Duration) {
	raw, err := tcp.SyscallConn()
	if err != nil || long <= 0 {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(long.Milliseconds()))
	})
}
