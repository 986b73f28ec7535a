// The provisioner: turns claims of the StorageClass `local` into folders on the node the scheduler chose.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	storagelisters "k8s.io/client-go/listers/storage/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	provisionerName    = "valkeeper.local/provisioner"
	selectedNode       = "volume.kubernetes.io/selected-node"
	provisionedBy      = "pv.kubernetes.io/provisioned-by"
	provisionerTimeout = 10 * time.Second
)

// provisioner looks at all claims and volumes whenever one of them changes: there are few.
type provisioner struct {
	client  kubernetes.Interface
	state   string
	claims  corelisters.PersistentVolumeClaimLister
	volumes corelisters.PersistentVolumeLister
	classes storagelisters.StorageClassLister
}

// runProvisioner serves until it is told to stop. args are a kubeconfig and the state folder of the cluster.
func runProvisioner(args []string) int {
	if len(args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: provisioner KUBECONFIG STATE")
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	config, err := clientcmd.BuildConfigFromFlags("", args[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, "provisioner:", err)
		return 1
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		fmt.Fprintln(os.Stderr, "provisioner:", err)
		return 1
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	core := factory.Core().V1()
	p := &provisioner{
		client:  client,
		state:   args[1],
		claims:  core.PersistentVolumeClaims().Lister(),
		volumes: core.PersistentVolumes().Lister(),
		classes: factory.Storage().V1().StorageClasses().Lister(),
	}
	// One pending wake-up is enough, however many changes there were.
	wake := make(chan struct{}, 1)
	notify := func() {
		select {
		case wake <- struct{}{}:
		default:
		}
	}
	handler := cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { notify() },
		UpdateFunc: func(any, any) { notify() },
		DeleteFunc: func(any) { notify() },
	}
	for _, informer := range []cache.SharedIndexInformer{
		core.PersistentVolumeClaims().Informer(), core.PersistentVolumes().Informer(),
		factory.Storage().V1().StorageClasses().Informer(),
	} {
		if _, err := informer.AddEventHandler(handler); err != nil {
			fmt.Fprintln(os.Stderr, "provisioner:", err)
			return 1
		}
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	p.serve(ctx, wake, notify)
	return 0
}

func (p *provisioner) serve(ctx context.Context, wake <-chan struct{}, notify func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-wake:
		}
		if !p.reconcile(ctx) {
			time.AfterFunc(time.Second, notify)
		}
	}
}

// reconcile is false when something failed and should be tried again.
func (p *provisioner) reconcile(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, provisionerTimeout)
	defer cancel()
	good := true
	check := func(what, name string, err error) {
		// A conflict means that our copy is old: the newer one is on its way and wakes us.
		if err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) && !apierrors.IsAlreadyExists(err) {
			fmt.Fprintf(os.Stderr, "provisioner: %s %s: %v\n", what, name, err)
			good = false
		}
	}
	claims, _ := p.claims.List(labels.Everything())
	for _, claim := range claims {
		check("provision", claim.Namespace+"/"+claim.Name, p.provision(ctx, claim))
		check("expand", claim.Namespace+"/"+claim.Name, p.expand(ctx, claim))
	}
	volumes, _ := p.volumes.List(labels.Everything())
	for _, volume := range volumes {
		check("reclaim", volume.Name, p.reclaim(ctx, volume))
	}
	return good
}

// provision makes the folder and the volume of a claim whose node is known.
func (p *provisioner) provision(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	node := claim.Annotations[selectedNode]
	if claim.Spec.VolumeName != "" || claim.Spec.StorageClassName == nil || node == "" || claim.DeletionTimestamp != nil {
		return nil
	}
	class, err := p.classes.Get(*claim.Spec.StorageClassName)
	if err != nil || class.Provisioner != provisionerName {
		return err
	}
	volume := p.volumeFor(claim, class, node)
	if _, err := p.volumes.Get(volume.Name); err == nil {
		return nil
	}
	path := volume.Spec.Local.Path
	if _, err := os.Stat(filepath.Join(p.state, node)); err != nil {
		return fmt.Errorf("node %s is not one of ours: %w", node, err)
	}
	if err := os.MkdirAll(path, 0o777); err != nil {
		return err
	}
	// Again, because the mask of this process took bits away: whoever the pod runs as may write.
	if err := os.Chmod(path, 0o777); err != nil {
		return err
	}
	_, err = p.client.CoreV1().PersistentVolumes().Create(ctx, volume, metav1.CreateOptions{})
	return err
}

func (p *provisioner) volumeFor(claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass, node string) *corev1.PersistentVolume {
	name := "pvc-" + string(claim.UID)
	policy := corev1.PersistentVolumeReclaimDelete
	if class.ReclaimPolicy != nil {
		policy = *class.ReclaimPolicy
	}
	onNode := corev1.NodeSelectorRequirement{
		Key: corev1.LabelHostname, Operator: corev1.NodeSelectorOpIn, Values: []string{node},
	}
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{provisionedBy: provisionerName}},
		Spec: corev1.PersistentVolumeSpec{
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: claim.Spec.Resources.Requests[corev1.ResourceStorage]},
			AccessModes:                   claim.Spec.AccessModes,
			VolumeMode:                    claim.Spec.VolumeMode,
			StorageClassName:              class.Name,
			PersistentVolumeReclaimPolicy: policy,
			PersistentVolumeSource: corev1.PersistentVolumeSource{
				Local: &corev1.LocalVolumeSource{Path: filepath.Join(p.state, node, "volumes", name)},
			},
			ClaimRef: &corev1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim",
				Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID},
			NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{
				NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{onNode}}},
			}},
		},
	}
}

// expand grants a larger claim: a folder has no size, so only the objects change.
func (p *provisioner) expand(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	wanted := claim.Spec.Resources.Requests[corev1.ResourceStorage]
	has := claim.Status.Capacity[corev1.ResourceStorage]
	if claim.Status.Phase != corev1.ClaimBound || wanted.Cmp(has) <= 0 {
		return nil
	}
	volume, err := p.volumes.Get(claim.Spec.VolumeName)
	if err != nil || volume.Annotations[provisionedBy] != provisionerName {
		return err
	}
	if size := volume.Spec.Capacity[corev1.ResourceStorage]; wanted.Cmp(size) > 0 {
		volume = volume.DeepCopy()
		volume.Spec.Capacity[corev1.ResourceStorage] = wanted
		if _, err := p.client.CoreV1().PersistentVolumes().Update(ctx, volume, metav1.UpdateOptions{}); err != nil {
			return err
		}
	}
	claim = claim.DeepCopy()
	claim.Status.Capacity[corev1.ResourceStorage] = wanted
	claim.Status.Conditions = nil
	_, err = p.client.CoreV1().PersistentVolumeClaims(claim.Namespace).UpdateStatus(ctx, claim, metav1.UpdateOptions{})
	return err
}

// reclaim deletes the folder and then the volume of a claim that is gone.
func (p *provisioner) reclaim(ctx context.Context, volume *corev1.PersistentVolume) error {
	if volume.Annotations[provisionedBy] != provisionerName || volume.Spec.Local == nil ||
		volume.Status.Phase != corev1.VolumeReleased || volume.DeletionTimestamp != nil ||
		volume.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimDelete {
		return nil
	}
	// A path that someone edited is not ours to delete.
	if inside, err := filepath.Match(filepath.Join(p.state, "*", "volumes", "pvc-*"), volume.Spec.Local.Path); err != nil || !inside {
		return fmt.Errorf("its path %s is not one we made", volume.Spec.Local.Path)
	}
	if err := os.RemoveAll(volume.Spec.Local.Path); err != nil {
		return err
	}
	return p.client.CoreV1().PersistentVolumes().Delete(ctx, volume.Name, metav1.DeleteOptions{})
}
