"""Label values of public data sets, as the sets publish them.

Each list names the values 1, 2, 3, ... in order; 0 is the background. The spelling is the set's.
"""

from __future__ import annotations

# github.com/wasserth/TotalSegmentator, totalsegmentator/map_to_binary.py: class_map["total"] of
# version 2.18.0. Versions 2.x and task total_v3 differ in value 26 alone (vertebrae_S1, _L6).
_TOTALSEGMENTATOR = """
    spleen, kidney_right, kidney_left, gallbladder, liver, stomach, pancreas,
    adrenal_gland_right, adrenal_gland_left, lung_upper_lobe_left, lung_lower_lobe_left,
    lung_upper_lobe_right, lung_middle_lobe_right, lung_lower_lobe_right, esophagus, trachea,
    thyroid_gland, small_bowel, duodenum, colon, urinary_bladder, prostate, kidney_cyst_left,
    kidney_cyst_right, sacrum, vertebrae_S1, vertebrae_L5, vertebrae_L4, vertebrae_L3,
    vertebrae_L2, vertebrae_L1, vertebrae_T12, vertebrae_T11, vertebrae_T10, vertebrae_T9,
    vertebrae_T8, vertebrae_T7, vertebrae_T6, vertebrae_T5, vertebrae_T4, vertebrae_T3,
    vertebrae_T2, vertebrae_T1, vertebrae_C7, vertebrae_C6, vertebrae_C5, vertebrae_C4,
    vertebrae_C3, vertebrae_C2, vertebrae_C1, heart, aorta, pulmonary_vein,
    brachiocephalic_trunk, subclavian_artery_right, subclavian_artery_left,
    common_carotid_artery_right, common_carotid_artery_left, brachiocephalic_vein_left,
    brachiocephalic_vein_right, atrial_appendage_left, superior_vena_cava, inferior_vena_cava,
    portal_vein_and_splenic_vein, iliac_artery_left, iliac_artery_right, iliac_vena_left,
    iliac_vena_right, humerus_left, humerus_right, scapula_left, scapula_right, clavicula_left,
    clavicula_right, femur_left, femur_right, hip_left, hip_right, spinal_cord,
    gluteus_maximus_left, gluteus_maximus_right, gluteus_medius_left, gluteus_medius_right,
    gluteus_minimus_left, gluteus_minimus_right, autochthon_left, autochthon_right,
    iliopsoas_left, iliopsoas_right, brain, skull, rib_left_1, rib_left_2, rib_left_3,
    rib_left_4, rib_left_5, rib_left_6, rib_left_7, rib_left_8, rib_left_9, rib_left_10,
    rib_left_11, rib_left_12, rib_right_1, rib_right_2, rib_right_3, rib_right_4, rib_right_5,
    rib_right_6, rib_right_7, rib_right_8, rib_right_9, rib_right_10, rib_right_11,
    rib_right_12, sternum, costal_cartilages
"""

# The same file: class_map["total_v1"], of versions before 2.0. From value 7 on they differ.
_TOTALSEGMENTATOR_V1 = """
    spleen, kidney_right, kidney_left, gallbladder, liver, stomach, aorta, inferior_vena_cava,
    portal_vein_and_splenic_vein, pancreas, adrenal_gland_right, adrenal_gland_left,
    lung_upper_lobe_left, lung_lower_lobe_left, lung_upper_lobe_right, lung_middle_lobe_right,
    lung_lower_lobe_right, vertebrae_L5, vertebrae_L4, vertebrae_L3, vertebrae_L2, vertebrae_L1,
    vertebrae_T12, vertebrae_T11, vertebrae_T10, vertebrae_T9, vertebrae_T8, vertebrae_T7,
    vertebrae_T6, vertebrae_T5, vertebrae_T4, vertebrae_T3, vertebrae_T2, vertebrae_T1,
    vertebrae_C7, vertebrae_C6, vertebrae_C5, vertebrae_C4, vertebrae_C3, vertebrae_C2,
    vertebrae_C1, esophagus, trachea, heart_myocardium, heart_atrium_left, heart_ventricle_left,
    heart_atrium_right, heart_ventricle_right, pulmonary_artery, brain, iliac_artery_left,
    iliac_artery_right, iliac_vena_left, iliac_vena_right, small_bowel, duodenum, colon,
    rib_left_1, rib_left_2, rib_left_3, rib_left_4, rib_left_5, rib_left_6, rib_left_7,
    rib_left_8, rib_left_9, rib_left_10, rib_left_11, rib_left_12, rib_right_1, rib_right_2,
    rib_right_3, rib_right_4, rib_right_5, rib_right_6, rib_right_7, rib_right_8, rib_right_9,
    rib_right_10, rib_right_11, rib_right_12, humerus_left, humerus_right, scapula_left,
    scapula_right, clavicula_left, clavicula_right, femur_left, femur_right, hip_left,
    hip_right, sacrum, face, gluteus_maximus_left, gluteus_maximus_right, gluteus_medius_left,
    gluteus_medius_right, gluteus_minimus_left, gluteus_minimus_right, autochthon_left,
    autochthon_right, iliopsoas_left, iliopsoas_right, urinary_bladder
"""

# dataset.json of AMOS22 (amos22.grand-challenge.org), where 8 is misspelt "arota".
_AMOS = """
    spleen, right kidney, left kidney, gall bladder, esophagus, liver, stomach, aorta, postcava,
    pancreas, right adrenal gland, left adrenal gland, duodenum, bladder, prostate/uterus
"""

# Synapse syn3193805, "Multi-Atlas Labeling Beyond the Cranial Vault", abdomen.
_BTCV = """
    spleen, right kidney, left kidney, gallbladder, esophagus, liver, stomach, aorta, inferior
    vena cava, portal vein and splenic vein, pancreas, right adrenal gland, left adrenal gland
"""

# github.com/JunMa11/FLARE, FLARE22/Evaluation/FLARE22_DSC_NSD_Eval.py: the order of its organs.
_FLARE22 = """
    liver, right kidney, spleen, pancreas, aorta, inferior vena cava, right adrenal gland, left
    adrenal gland, gallbladder, esophagus, stomach, duodenum, left kidney
"""

# github.com/MrGiovanni/AbdomenAtlas, README: the class map of 1.1; its first nine are that of 1.0.
_ABDOMENATLAS = """
    aorta, gall_bladder, kidney_left, kidney_right, liver, pancreas, postcava, spleen, stomach,
    adrenal_gland_left, adrenal_gland_right, bladder, celiac_trunk, colon, duodenum, esophagus,
    femur_left, femur_right, hepatic_vessel, intestine, lung_left, lung_right,
    portal_vein_and_splenic_vein, prostate, rectum
"""


def _numbered(names: str) -> dict[str, tuple[int, ...]]:
    listed = [" ".join(name.split()) for name in names.split(",")]
    return {name: (value,) for value, name in enumerate(listed, 1)}


PUBLISHED: dict[str, dict[str, tuple[int, ...]]] = {
    "totalsegmentator": _numbered(_TOTALSEGMENTATOR),
    "totalsegmentator-v1": _numbered(_TOTALSEGMENTATOR_V1),
    "amos": _numbered(_AMOS),
    "btcv": _numbered(_BTCV),
    "flare22": _numbered(_FLARE22),
    "abdomenatlas": _numbered(_ABDOMENATLAS),
    # github.com/neheller/kits23, kits23/configuration/labels.py; KiTS19 and KiTS21 alike
    "kits": _numbered("kidney, tumor, cyst"),
    # Bilic et al., The Liver Tumor Segmentation Benchmark (LiTS), Medical Image Analysis 2023
    "lits": _numbered("liver, tumor"),
    # Task07_Pancreas/dataset.json of the Medical Segmentation Decathlon (medicaldecathlon.com)
    "msd-pancreas": _numbered("pancreas, cancer"),
}
