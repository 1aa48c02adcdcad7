package store

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// Schemes of Config.Redis. With rediss instead of redis, each uses TLS.
const (
	schemeSingle   = "redis"
	schemeSentinel = "redis+sentinel"
	schemeCluster  = "redis+cluster"
)

const urlForms = "redis://[user:password@]host:port[/db], redis+sentinel://[user:password@]host:port,…/master[/db] " +
	"or redis+cluster://[user:password@]host:port,…; rediss… for TLS; or " + Embedded + ":DIR, or " + Embedded

// escapes is the remedy for a URL that cannot be parsed: usually its password contains a character that ends a part of a URL.
const escapes = "in a user name or password escape / as %2F, # as %23, ? as %3F, @ as %40, : as %3A, % as %25 and a space as %20"

// parseRedis parses Config.Redis, and reads the files that TLS needs.
//
// Its errors repeat only the scheme of the URL. In a malformed URL any other part may belong to the
// password: in redis://:ab/cd@host the host is ":ab", and the path "cd@host".
func parseRedis(c Config) (*redis.UniversalOptions, error) {
	u, err := url.Parse(c.Redis)
	if err != nil {
		return nil, fmt.Errorf("-redis: malformed URL: use %s; %s", urlForms, escapes)
	}
	if u.Fragment != "" || strings.HasSuffix(c.Redis, "#") || strings.Contains(u.Path, "@") {
		return nil, fmt.Errorf("-redis: malformed URL: its password seems to contain a character that must be escaped: use %s; %s", urlForms, escapes)
	}
	o := &redis.UniversalOptions{Addrs: strings.Split(u.Host, ",")}
	scheme, secure := u.Scheme, strings.HasPrefix(u.Scheme, "rediss")
	if secure {
		scheme = "redis" + strings.TrimPrefix(scheme, "rediss")
		if o.TLSConfig, err = c.tls(); err != nil {
			return nil, err
		}
	} else if c.RedisCA != "" || c.RedisCert != "" {
		return nil, errors.New("-redis-ca and -redis-cert need a rediss:// URL")
	}
	if scheme != schemeSingle && scheme != schemeSentinel && scheme != schemeCluster {
		if !strings.HasPrefix(strings.ToLower(c.Redis), u.Scheme+"://") || u.Scheme == "" {
			return nil, fmt.Errorf("-redis: the URL has no scheme: use %s", urlForms)
		}
		return nil, fmt.Errorf("-redis: unknown scheme %q: use %s", u.Scheme, urlForms)
	}
	if u.Host == "" {
		return nil, fmt.Errorf("-redis: the host is missing: use %s", urlForms)
	}
	for i, addr := range o.Addrs {
		if addr == "" || addr[0] == ':' {
			return nil, fmt.Errorf("-redis: a host name is missing: use %s; %s", urlForms, escapes)
		}
		if host, port, _ := strings.Cut(addr, ":"); port == "" && !strings.Contains(addr, "]") {
			o.Addrs[i] = host + ":" + map[bool]string{true: "26379", false: "6379"}[scheme == schemeSentinel]
		}
	}
	o.Username = u.User.Username()
	o.Password, _ = u.User.Password()
	path := strings.FieldsFunc(u.Path, func(r rune) bool { return r == '/' })
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, fmt.Errorf("-redis: the parameters after the ? are malformed: escape & as %%26, ; as %%3B, + as %%2B and %% as %%25 in their values; %s", escapes)
	}
	switch scheme {
	case schemeSingle:
		if len(o.Addrs) > 1 {
			return nil, fmt.Errorf("-redis: %s:// takes one host: use redis+sentinel:// or redis+cluster:// for several", u.Scheme)
		}
	case schemeSentinel:
		if len(path) == 0 {
			return nil, fmt.Errorf("-redis: %s:// needs the name of the master as its path: use %s", u.Scheme, urlForms)
		}
		o.MasterName, path = path[0], path[1:]
		o.SentinelUsername, o.SentinelPassword = query.Get("sentinel_username"), query.Get("sentinel_password")
		query.Del("sentinel_username")
		query.Del("sentinel_password")
	case schemeCluster:
		o.IsClusterMode = true
	}
	if db := query.Get("db"); db != "" {
		path = append(path, db)
		query.Del("db")
	}
	if len(path) > 0 {
		if o.DB, err = strconv.Atoi(path[0]); err != nil || o.DB < 0 || len(path) > 1 || o.IsClusterMode {
			return nil, fmt.Errorf("-redis: the path must be the number of a database: use %s; %s", urlForms, escapes)
		}
	}
	if text := query.Get("pool_size"); text != "" {
		if o.PoolSize, err = strconv.Atoi(text); err != nil || o.PoolSize < 1 {
			return nil, errors.New("-redis: pool_size must be at least 1")
		}
		query.Del("pool_size")
	}
	if len(query) > 0 {
		return nil, fmt.Errorf("-redis: unknown parameter after the ?: the parameters are db, pool_size and, for redis+sentinel://, sentinel_username and sentinel_password; %s", escapes)
	}
	return o, nil
}

// tls returns the TLS configuration. The server's name is always verified.
func (c Config) tls() (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.RedisCA != "" {
		pem, err := os.ReadFile(c.RedisCA)
		if err != nil {
			return nil, fmt.Errorf("-redis-ca: %w", err)
		}
		if t.RootCAs = x509.NewCertPool(); !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("-redis-ca: %s contains no certificate in PEM format", c.RedisCA)
		}
	}
	if c.RedisCert != "" || c.RedisKey != "" {
		pair, err := tls.LoadX509KeyPair(c.RedisCert, c.RedisKey)
		if err != nil {
			return nil, fmt.Errorf("-redis-cert, -redis-key: %w", err)
		}
		t.Certificates = []tls.Certificate{pair}
	}
	return t, nil
}

// dialTimeout is how long connecting may take.
const dialTimeout = 2 * time.Second

// noMaintNotifications saves a command per connection, which asks whether a server announces maintenance.
var noMaintNotifications = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}

// place returns where Redis is, for the log.
func place(o *redis.UniversalOptions) string {
	at := strings.Join(o.Addrs, ",")
	if o.MasterName != "" {
		at += "/" + o.MasterName
	}
	return at
}

// connect makes the client. It does not wait for Redis.
func connect(c Config, o *redis.UniversalOptions, dial func(ctx context.Context, network, address string) (net.Conn, error),
	connected func(ctx context.Context, c *redis.Conn) error) redis.UniversalClient {
	o.Dialer, o.OnConnect = dial, connected
	// The client must not repeat a command: an append that is sent twice is stored twice.
	// (In a Cluster, the type once keeps the client from it.)
	o.MaxRetries = -1
	o.DialerRetries = 1
	o.DialTimeout = dialTimeout
	o.ReadTimeout = c.Timeout
	o.WriteTimeout = c.Timeout
	o.ContextTimeoutEnabled = true
	o.Protocol = 2 // Pub/Sub is received by our own loop, which does not need RESP3
	o.DisableIdentity = true
	o.MaintNotificationsConfig = noMaintNotifications
	switch {
	case o.IsClusterMode:
		cluster := o.Cluster()
		cluster.MaxRedirects = 8 // while a slot moves
		return redis.NewClusterClient(cluster)
	case o.MasterName != "":
		client := redis.NewFailoverClient(o.Failover())
		client.AddHook(dialHook{})
		return client
	}
	return redis.NewClient(o.Simple())
}

// master returns the client of the server that holds a session.
func (s *Store) master(ctx context.Context, key string) (*redis.Client, error) {
	switch rdb := s.rdb.(type) {
	case *redis.ClusterClient:
		return rdb.MasterForKey(ctx, key)
	case *redis.Client:
		return rdb, nil
	}
	return nil, fmt.Errorf("a client of type %T has no master", s.rdb)
}
